"""From a Python model to programs: dynamo, export, and the levels below them."""
