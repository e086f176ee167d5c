"""The soak test: `./bootstrap soak --minutes N`. See __main__.py."""
