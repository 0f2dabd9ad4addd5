"""Bad input and faults: which test shows what each gives on each host is in rows.txt."""
