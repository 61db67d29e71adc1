"""The device side of virtio: served to virtual machines over vhost-user."""
