"""Tests. A package, so that no other of this name is found before it."""
