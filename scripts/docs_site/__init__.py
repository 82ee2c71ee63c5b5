"""Builds the documentation site: guide, a page for each method, and the API."""
