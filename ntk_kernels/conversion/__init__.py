"""Conversion of real prefixes to states: `prefix_to_state` (api.py), `PrefixAccumulator`, and the fits behind them."""
