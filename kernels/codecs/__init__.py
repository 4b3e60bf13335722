"""Lossy codecs for what a forward pass leaves behind. Used only where the user has allowed them."""
