"""One command on a machine with an NVIDIA GPU: are the kernels right there, and how fast are they?

``python -m bench.gpu_check`` needs this folder's tree and a CUDA PyTorch, no network and no
installation. It finds or builds the libraries, runs the tests and the sanitizers, times the cases
that filbert's aims are about, and leaves one JSON file, one table and one log.
"""
