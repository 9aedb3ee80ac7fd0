"""An emulated accelerator, "emu": two devices as strict as real ones, on the CPU's kernels.

Registering it changes the whole process (torch has one place for such a device, and then takes it for the machine's
accelerator). So the tests on it run in a process of their own, which ``tests/test_device.py`` starts.
"""
