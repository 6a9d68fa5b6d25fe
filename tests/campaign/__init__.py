"""A campaign of faults against training: kills, damaged files, full disks, nonsense."""
