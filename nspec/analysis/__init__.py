"""What masks say about languages: density and overlap."""
