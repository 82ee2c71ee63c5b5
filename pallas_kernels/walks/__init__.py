"""Machinery that operations share: operands, lists, tiles, streams."""
