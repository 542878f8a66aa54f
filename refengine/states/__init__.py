"""States of sequences as values: saved in files, forked, and kept so that a prompt need not be read again.

file      a file of arrays with a header and a checksum, written atomically
arrays    the states of a slot as host arrays: of one rank, and joined and cut for any layout of ranks
state     `State`: a sequence between two tokens, with its token ids and its sampling
shelf     the snapshots that one process keeps by name
prefixes  the prefixes that have snapshots, under a budget of bytes; the loop calls it
disk      snapshots of prefixes in a directory
"""
