"""Files: how they are read, written and trusted, whatever is in them, and the folder that the package keeps its own in.

``documents``: versioned JSON with a digest, read with suspicion. ``writing``: whole or not at all. ``cache_folder``:
where kernels, profiles and calibrations are kept. ``trust``: who else could have changed a file. Imports ground words
alone.
"""
