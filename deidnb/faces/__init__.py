"Faces: read pictures, find faces, align crops, draw masks"
