"""Tests of the page in Chromium. This file makes the folder a package, for fixtures with the scope of a package."""
