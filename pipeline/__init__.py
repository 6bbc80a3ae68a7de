"""Twotower: a product catalog's texts and images, embedded in batches into LanceDB tables that can be searched."""

__version__ = "0.1.0"
