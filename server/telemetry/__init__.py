"""What the device's sensors say: read off the event loop, published as frozen samples."""
