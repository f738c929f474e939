"""How anagrams are measured: metrics, a protocol of pairs and seeds, its report, the best of N."""
