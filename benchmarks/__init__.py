"""What MarketSync costs beside dlt and a plain loop, measured whole: `make bench`. The product uses nothing of it."""
