"""Prefixes in models of other libraries; each package needs the library that it is named after."""
