import os

# Only in the process that tests/test_device.py starts: to import these tests is to register the device.
collect_ignore_glob = [] if "KONDO_EMULATED_DEVICE" in os.environ else ["test_*.py"]
