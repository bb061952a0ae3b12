"""What stands beside everything that is made from OpenMoji."""

FILE = "NOTICE"
TEXT = """\
All emojis designed by OpenMoji - the open-source emoji and icon project (https://openmoji.org).
License: CC BY-SA 4.0 (https://creativecommons.org/licenses/by-sa/4.0/)

The weights in this folder were trained on pictures of OpenMoji 17.0.0, rasterised at 64 x 64 pixels on white, and are
under the same license.
"""
