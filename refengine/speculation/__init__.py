"""Speculation: the prediction head drafts tokens, and the trunk checks them all in one call.

drafting     the head's state of each sequence, drafts, and calls that verify them
acceptance   the rule by which drafts are kept
pace         the number of drafts, by measured costs and acceptance
"""

MOST_DRAFTS = 64  # of one call
