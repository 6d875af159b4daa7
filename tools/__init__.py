"""Programs beside the framework; each needs nothing but Python.

python3 -m tools.demo       a disk over a real socket, driven and verified, with figures
python3 -m tools.bench      cost per request, beside the kernel's own os.preadv
python3 -m tools.bundle     the framework, with a device if asked, as one Python file
python3 -m tools.layouts    the tests in each of the three ways to vendor the framework, on each CPython found
"""
