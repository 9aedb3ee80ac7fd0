"""Adapters for host libraries: one small module a host, imported only where that host is used.

A module here knows its host's stable seam and calls nothing of kondo_hooks but its public API.
"""
