"""Dask: places tickets on its clusters, and hosts nodes in their workers. The only room that knows
distributed.
"""
