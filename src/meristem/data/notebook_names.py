"""The names of people and places of ``data.source=notebook``.

Some are those that people and towns have, the others are put together. Every eighth name of a person is held out: it
stands in held-out documents alone.
"""

from typing import Final

_STARTS: Final = "Al Be Ca Do El Fa Gi Ha Il Jo Ka Li Mo Ne Or Pa Ri Sa To Ul Va Wi Ya Ze".split()
_ENDS: Final = "da len mir nar rol sel tan via wen lod rist bert mund ska nor dine".split()
_SITES: Final = "Oster Linden Stein Kar Brun Wald Mar Hol Nyr Vester Alten Gran Fal Hamm Kirk Lund Soder Thorn".split()
_SITE_ENDS: Final = "burg ford haven mouth stad wick dale port field ness".split()

_MIDDLES: Final = ("", *"ra li no ve mi to sa lu be ki da re".split())

IN_USE: Final = (
    "Ada Agnes Aisha Alan Alice Amir Anna Anton Ayla Ben Bob Boris Bruno Carla Carlos Chloe Clara Dana David "
    "Diego Dora Edith Elena Eli Emil Emma Erik Eva Felix Fiona Finn Frank Freya George Grace Greta Hana Hanna "
    "Hassan Helen Henry Hugo Ida Igor Ines Ingrid Iris Isaac Ivan Jack Jakob James Jane Jin John Jonas Jorge "
    "Judith Julia Karin Karl Kate Kenji Klara Lars Laura Lena Leo Lily Lina Linus Lisa Luca Lucy Luis Maja Maria "
    "Martha Martin Mary Mei Mia Mila Mona Nadia Nina Noah Nora Olga Oliver Omar Oscar Otto Paula Paul Peter Petra "
    "Priya Ravi Rita Robert Rosa Ruth Sam Sara Simon Sonia Sonja Stefan Susan Tara Tariq Theo Thomas Tom Tove "
    "Vera Viktor Walter Yara Yusuf Zoe Abel Adam Adele Aino Akira Alba Albert Alex Alexa Alma Amal Amara Amelia "
    "Amina Amy Ana Andrea Andrew Angela Anita Ann Annika Antonia Arjun Arthur Asha Astrid Aurora Axel Barbara "
    "Basil Beatrice Bella Bernd Berta Bill Birgit Brian Camila Carl Carmen Celia Charles Charlie Chen Chris "
    "Christina Claire Conrad Cora Cyril Daisy Daniel Daria Deniz Denis Diana Dieter Dmitri Donna Doris Edgar "
    "Eduardo Ella Elias Elif Elisa Elizabeth Ellen Elsa Emilia Emily Enzo Eric Esther Ethan Eugene Fabian Farid "
    "Fatima Fernando Flora Florian Francis Fred Fritz Gabriel Gemma Gerard Gina Giulia Gloria Gustav Haruto Harry "
    "Heidi Heinz Hilda Hiro Ian Ilse Imani Irene Isabel Jacob Jan Janet Jason Jasmin Jens Jean Jill Jim Joan Joe "
    "Johan Jonathan Jose Josef Juan Juri Kai Kamal Karen Katya Kevin Kim Kofi Kurt Lara Laila Layla Leila "
    "Leon Lewis Li Liam Lola Lorenzo Louis Louise Lucas Ludwig Lydia Mabel Magda Malik Manuel Marco Margaret "
    "Marie Mario Mark Marta Mateo Matthew Max Maya Mehmet Michael Miguel Mike Miriam Mohamed Molly Monica "
    "Moritz Nancy Naomi Natalia Neil Nelly Nick Nico Nils Nikolai Nour Olaf Olivia Omid Paolo Pablo Patricia "
    "Pavel Pedro Philip Pia Pierre Rachel Ralph Rania Raul Rebecca Richard Rob Roland Roman Ron Rosie Rudolf "
    "Sabine Sally Samir Samuel Sandra Sasha Scott Selma Sean Silvia Sina Sophie Steve Sven Tamar Tanya Ted Teresa "
    "Tim Tina Tobias Tony Ulla Ulrich Uma Ursula Valeria Vanessa Victor Victoria Vincent Wanda Wei William "
    "Willy Yuki Yvonne Zara"
).split()
"""Names that people have; every eighth of them is held out, as of all names."""
_MADE: Final = (start + middle + end for start in _STARTS for middle in _MIDDLES for end in _ENDS)
NAMES: Final = (*(name for name in _MADE if name not in IN_USE), *IN_USE)
"""So many that a tokenizer does not have most of them as one token: who has learned to recall of names in general can
recall of one that it never met."""
CITIES: Final = (
    "Oslo Lima Cairo Quito Turin Paris London Berlin Rome Madrid Lisbon Vienna Prague Warsaw Dublin Athens Bergen "
    "Boston Chicago Dallas Delhi Dakar Geneva Havana Helsinki Istanbul Jakarta Kyoto Lagos Leeds Lyon Milan "
    "Moscow Mumbai Munich Nairobi Naples Osaka Porto Riga Seattle Seoul Sofia Stockholm Sydney Tokyo Toronto "
    "Tunis Utrecht Valencia Venice York Zagreb Zurich Aberdeen Accra Adelaide Algiers Amman Amsterdam Ankara "
    "Antwerp Atlanta Auckland Austin Baghdad Baku Bangkok Barcelona Basel Beijing Beirut Belfast Belgrade "
    "Birmingham Bogota Bologna Bordeaux Bremen Brighton Brisbane Bristol Brno Brussels Budapest Bucharest Calgary "
    "Cambridge Canberra Caracas Cardiff Casablanca Cologne Copenhagen Cork Damascus Denver Detroit Dresden Dubai "
    "Durban Edinburgh Florence Frankfurt Gdansk Genoa Ghent Glasgow Graz Hamburg Hanoi Houston Izmir Johannesburg "
    "Kabul Kampala Karachi Kolkata Krakow Kyiv Leipzig Lille Ljubljana Liverpool Lucerne Malaga Manchester Manila "
    "Marseille Melbourne Memphis Miami Minsk Montreal Nantes Odessa Ottawa Oxford Palermo Perth Phoenix Pisa "
    "Portland Pune Reykjavik Rotterdam Salzburg Santiago Sarajevo Seville Shanghai Singapore Tallinn Tampere "
    "Tbilisi Tehran Tirana Trieste Trondheim Vilnius Wellington"
).split()
"""Towns that there are."""
PLACES: Final = (*CITIES, *(site + end for site in _SITES for end in _SITE_ENDS))
