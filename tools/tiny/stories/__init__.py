"""The text the embedded model learns from: a small world of stories, skills and chats, all seeded and
checkable."""

from .world import Report, Story, check, parse, plots, tell

__all__ = ["Report", "Story", "check", "parse", "plots", "tell"]
