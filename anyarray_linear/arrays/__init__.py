"""What an array is and where it is: place, device, the ways to another one, and the words for what is wrong."""
