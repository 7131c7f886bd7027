"""What code inside a run uses: the current run, its fence, its progress and its loops. Knows no
queue.
"""
