"""`python -m benchmarks gpu`: everything that this repository says about an NVIDIA GPU, in calls of a few minutes.

Reading order: `setting` (where a run is and what it may do), `rows` (the file), `engine` (time, order, signals), then a module
per part: `gate`, `sweep`, `kernels`, `forward` with `denoisers`, `prefill`, `backbones`. `report` prints the table at the end.
"""
