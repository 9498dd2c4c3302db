"""Two commits: their trees, a measuring process, and what moved beyond the noise."""
