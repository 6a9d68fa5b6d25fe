"""Comparisons of many training runs: grids of settings, and dense against Lighthouse."""
