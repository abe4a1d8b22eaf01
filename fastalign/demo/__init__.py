"""Everything the demonstration and the tests need to run on a real model without a hub."""
