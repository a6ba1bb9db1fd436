"""The fault campaign: real processes, real files, and everything that can happen to them.

    python -m tests.faults [--quick] [--only NAME] [--seed N] [--json]

One module for each kind of fault (`campaign.KINDS` is the table), each a function that brings the
fault about n times and counts how often the cache kept its promises. `workplace` has the promises,
`host` and `processes` the processes, `failing_calls` the system calls that fail.
"""
