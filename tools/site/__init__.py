"""The documentation as a site: `python -m tools.site` builds it, and a broken link is an error."""
