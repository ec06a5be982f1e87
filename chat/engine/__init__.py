"""The inference engine: pure torch, no Django. Importing this package alone imports no torch."""
