"""Local attention on CUDA devices, written in Triton.

``kernels`` holds the device code and is the only module here that imports triton; ``local_attention`` chooses tiles and
launches; ``tiling`` and ``configs`` are plain Python; ``ahead`` makes cubins without a GPU.
"""
