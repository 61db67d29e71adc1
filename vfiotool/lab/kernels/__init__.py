"""Where the lab's kernels, QEMU and headers come from."""
