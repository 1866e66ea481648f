"""Trunks, adapters, heads, and the roles they answer."""

from lightning_perl.quiet import hush

hush()
