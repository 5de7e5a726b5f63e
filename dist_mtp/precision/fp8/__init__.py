"""FP8 training after DeepSeek-V3 (arXiv 2412.19437, section 3.3): what is quantised how, and who multiplies.

``tiles`` is the recipe, ``backend`` the interface to the devices' kernels, ``layer`` what a layer owns, ``linear`` the autograd
functions. Imports nothing else from the package but ``dist_mtp.precision`` and ``dist_mtp.errors``.
"""
