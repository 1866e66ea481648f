"""Trunks, adapters, heads, and the roles they answer."""
