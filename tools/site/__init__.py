"""The documentation as a site: `python -m tools.site` builds it into build/site; a broken link is an error."""
