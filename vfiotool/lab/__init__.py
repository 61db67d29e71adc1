"""The lab: QEMU guests with a virtual IOMMU on real kernels, for rehearsal and for tests.

`machines` says what a guest is made of, `packages`, `kernels`, `build` and `image` fetch and make
what it boots from, `guest` keeps one running guest, `run` runs one command in one.
"""
