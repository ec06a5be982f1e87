__version__ = "0.2.0"  # the newest release in CHANGELOG.md (docs/releasing.md)
