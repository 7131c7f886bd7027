"""Places tickets where the runs of other pools execute, such as on Dask. Claims no run, and knows
no cluster.
"""
