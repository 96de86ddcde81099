"""`irpe detect`: transformers' DETR with iRPE in its encoder, on data in COCO's format."""
