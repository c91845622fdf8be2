"""The built-in demo model: a class-conditional diffusion transformer of handwritten digits.

The checkpoint in ``model/`` is an ordinary diffusers ``DiTPipeline`` and loads as any other local folder does.
``digits`` draws the data, ``judge`` reads them. Imports files and ground words.
"""

from difa_compile.demo.checkpoint import demo_model_path, load_demo

__all__ = ["demo_model_path", "load_demo"]
