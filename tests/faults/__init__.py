"""Bad input and faults: the table of what each gives on each host is rows.py."""
