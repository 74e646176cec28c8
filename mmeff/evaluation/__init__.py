"""Comparing a fast model with the dense one: numbers, pictures, the page that shows them, and the folder they lie in.

`metrics`      PSNR, SSIM and their background-corrected kin; latency statistics
`pictures`     paired videos, strips, density maps, curves, time bars
`page`         one self-contained report.html
`run_folder`   the output folder, never mistaken for complete

Nothing is imported here: each module loads what it needs when it is used.
"""
