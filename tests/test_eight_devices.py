"""The tests of sharding: JAX counts its devices once, so they have a process of their own."""

from pathlib import Path


def test_on_eight_devices(start, pytestconfig):
    """All of `eight_devices/`, or those of the circle that is run here."""
    flags = ("-n0", "-q", "-m", pytestconfig.option.markexpr)
    folder = Path(__file__).with_name("eight_devices")
    command = start("-m", "pytest", *flags, str(folder), devices=8)
    assert command.end() == 0, command.text
