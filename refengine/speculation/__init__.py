"""Speculation: the prediction head drafts tokens, and the trunk checks them all in one call.

drafting     what the head has read of each sequence, drafts, and calls that verify them
acceptance   which drafts are kept
pace         how many drafts pay, by measured costs and acceptance
"""

MOST_DRAFTS = 64  # of one call
