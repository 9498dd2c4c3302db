"""Where common languages stand in the tree of languages, as a table.

A summary of the standard classification, written by hand for this package as handbooks of linguistics give it; nothing in
it is copied from a database. It is coarse: a group is here if languages of this table part in it, or if it is a branch that
textbooks name (marked ``*``). Of groups one inside the other with the same languages of this table, one is here. Families
are spelt as Glottolog spells them (Atlantic-Congo rather than Niger-Congo). Where linguists disagree, the table takes a
side or names no group:

- Continental and Insular Scandinavian divide North Germanic as it is spoken now; by descent Norwegian is with Icelandic.
- Punjabi and Gujarati are with Hindi (Central Indo-Aryan), Sindhi and Marathi are in no group below Indo-Aryan.
- Macrolanguages (Arabic, Chinese, Malay, Norwegian) are one entry, as in most corpora.

For another tree, or a language that is not here, :func:`nspec.analysis.languages.read_distances` reads distances of one's
own.

A line is a group (name) or a language (ISO 639-1, ISO 639-3, ISO 15924 script, name); what is indented below a group is
in it.
"""

from __future__ import annotations

TREE = """
Abkhaz-Adyge
  ab abk Cyrl Abkhaz
Afro-Asiatic
  Chadic *
    ha hau Latn Hausa
  Cushitic *
    aa aar Latn Afar
    om orm Latn Oromo
    so som Latn Somali
  Semitic *
    Central Semitic
      he heb Hebr Hebrew
      Arabic
        ar ara Arab Arabic
        mt mlt Latn Maltese
    Ethiopic
      am amh Ethi Amharic
      ti tir Ethi Tigrinya
Algic
  cr cre Cans Cree
  oj oji Cans Ojibwe
Athabaskan-Eyak-Tlingit
  nv nav Latn Navajo
Atlantic-Congo
  Atlantic *
    ff ful Latn Fula
    wo wol Latn Wolof
  Bantu *
    kg kon Latn Kongo
    ki kik Latn Kikuyu
    ln lin Latn Lingala
    ny nya Latn Chewa
    sn sna Latn Shona
    sw swa Latn Swahili
    Great Lakes Bantu
      lg lug Latn Ganda
      Rwanda-Rundi
        rn run Latn Rundi
        rw kin Latn Kinyarwanda
    Southern Bantu
      ts tso Latn Tsonga
      ve ven Latn Venda
      Nguni
        nr nbl Latn Southern Ndebele
        ss ssw Latn Swazi
        xh xho Latn Xhosa
        zu zul Latn Zulu
      Sotho-Tswana
        st sot Latn Southern Sotho
        tn tsn Latn Tswana
  Kwa *
    ak aka Latn Akan
  Volta-Niger *
    ee ewe Latn Ewe
    ig ibo Latn Igbo
    yo yor Latn Yoruba
Austroasiatic
  km khm Khmr Khmer
  vi vie Latn Vietnamese
Austronesian
  jv jav Latn Javanese
  mg mlg Latn Malagasy
  su sun Latn Sundanese
  tl tgl Latn Tagalog
  Malayic
    id ind Latn Indonesian
    ms msa Latn Malay
  Oceanic
    fj fij Latn Fijian
    mh mah Latn Marshallese
    Polynesian
      sm smo Latn Samoan
      to ton Latn Tongan
      Eastern Polynesian
        mi mri Latn Maori
        ty tah Latn Tahitian
Aymaran
  ay aym Latn Aymara
Basque
  eu eus Latn Basque
Dravidian
  te tel Telu Telugu
  South Dravidian
    kn kan Knda Kannada
    Tamil-Malayalam
      ml mal Mlym Malayalam
      ta tam Taml Tamil
Eskimo-Aleut
  iu iku Cans Inuktitut
  kl kal Latn Greenlandic
Indo-European
  Albanian *
    sq sqi Latn Albanian
  Armenian *
    hy hye Armn Armenian
  Balto-Slavic
    Baltic *
      lt lit Latn Lithuanian
      lv lav Latn Latvian
    Slavic *
      East Slavic
        be bel Cyrl Belarusian
        ru rus Cyrl Russian
        uk ukr Cyrl Ukrainian
      South Slavic
        Eastern South Slavic
          bg bul Cyrl Bulgarian
          mk mkd Cyrl Macedonian
        Western South Slavic
          sl slv Latn Slovenian
          Serbo-Croatian
            bs bos Latn Bosnian
            hr hrv Latn Croatian
            sr srp Cyrl Serbian
      West Slavic
        pl pol Latn Polish
        Czech-Slovak
          cs ces Latn Czech
          sk slk Latn Slovak
  Celtic *
    Brythonic
      br bre Latn Breton
      cy cym Latn Welsh
      kw cor Latn Cornish
    Goidelic
      ga gle Latn Irish
      gd gla Latn Scottish Gaelic
      gv glv Latn Manx
  Germanic *
    North Germanic
      Continental Scandinavian
        da dan Latn Danish
        sv swe Latn Swedish
        Norwegian
          nn nno Latn Norwegian Nynorsk
          no nor Latn Norwegian
      Insular Scandinavian
        fo fao Latn Faroese
        is isl Latn Icelandic
    West Germanic
      Anglo-Frisian
        en eng Latn English
        fy fry Latn Western Frisian
      High German
        de deu Latn German
        lb ltz Latn Luxembourgish
        yi yid Hebr Yiddish
      Low Franconian
        af afr Latn Afrikaans
        nl nld Latn Dutch
  Greek *
    el ell Grek Greek
  Indo-Iranian
    Indo-Aryan *
      ks kas Arab Kashmiri
      mr mar Deva Marathi
      ne nep Deva Nepali
      sa san Deva Sanskrit
      sd snd Arab Sindhi
      Central Indo-Aryan
        gu guj Gujr Gujarati
        pa pan Guru Punjabi
        Hindustani
          hi hin Deva Hindi
          ur urd Arab Urdu
      Eastern Indo-Aryan
        or ori Orya Odia
        Bengali-Assamese
          as asm Beng Assamese
          bn ben Beng Bengali
      Insular Indo-Aryan
        dv div Thaa Dhivehi
        si sin Sinh Sinhala
    Iranian *
      Eastern Iranian
        os oss Cyrl Ossetian
        ps pus Arab Pashto
      Western Iranian
        ku kur Latn Kurdish
        Persian
          fa fas Arab Persian
          tg tgk Cyrl Tajik
  Romance *
    ro ron Latn Romanian
    sc srd Latn Sardinian
    Italo-Western Romance
      Italo-Dalmatian
        co cos Latn Corsican
        it ita Latn Italian
      Western Romance
        fr fra Latn French
        rm roh Latn Romansh
        Ibero-Romance
          es spa Latn Spanish
          Galician-Portuguese
            gl glg Latn Galician
            pt por Latn Portuguese
        Occitano-Romance
          ca cat Latn Catalan
          oc oci Latn Occitan
Japonic
  ja jpn Jpan Japanese
Kartvelian
  ka kat Geor Georgian
Koreanic
  ko kor Kore Korean
Mande
  bm bam Latn Bambara
Mongolic-Khitan
  mn mon Cyrl Mongolian
Nakh-Daghestanian
  av ava Cyrl Avar
  ce che Cyrl Chechen
Quechuan
  qu que Latn Quechua
Sino-Tibetan
  Sinitic *
    zh zho Hans Chinese
  Tibeto-Burman *
    my mya Mymr Burmese
    Tibetic
      bo bod Tibt Tibetan
      dz dzo Tibt Dzongkha
Tai-Kadai
  za zha Latn Zhuang
  Southwestern Tai
    lo lao Laoo Lao
    th tha Thai Thai
Tupian
  gn grn Latn Guarani
Turkic
  cv chv Cyrl Chuvash
  Common Turkic
    Karluk
      ug uig Arab Uyghur
      uz uzb Latn Uzbek
    Kipchak
      ba bak Cyrl Bashkir
      kk kaz Cyrl Kazakh
      ky kir Cyrl Kyrgyz
      tt tat Cyrl Tatar
    Oghuz
      az aze Latn Azerbaijani
      tk tuk Latn Turkmen
      tr tur Latn Turkish
Uralic
  hu hun Latn Hungarian
  Finno-Saamic
    se sme Latn Northern Sami
    Finnic
      et est Latn Estonian
      fi fin Latn Finnish
"""

# Other codes of languages of the table: members that stand for a macrolanguage in common data sets, bibliographic codes
# of ISO 639-2, and codes that ISO 639-1 has given up.
ALIASES = {
    **{"arb": "ar", "als": "sq", "ayr": "ay", "azj": "az", "cmn": "zh", "ekk": "et", "fil": "tl", "fuv": "ff"},
    **{"gaz": "om", "khk": "mn", "kmr": "ku", "lvs": "lv", "nb": "no", "nob": "no", "npi": "ne", "ory": "or"},
    **{"pbt": "ps", "pes": "fa", "plt": "mg", "prs": "fa", "quy": "qu", "swh": "sw", "tw": "ak", "twi": "ak"},
    **{"uzn": "uz", "ydd": "yi", "zsm": "ms"},
    **{"alb": "sq", "arm": "hy", "baq": "eu", "bur": "my", "chi": "zh", "cze": "cs", "dut": "nl", "fre": "fr"},
    **{"geo": "ka", "ger": "de", "gre": "el", "ice": "is", "mac": "mk", "mao": "mi", "may": "ms", "per": "fa"},
    **{"rum": "ro", "slo": "sk", "tib": "bo", "wel": "cy"},
    **{"in": "id", "iw": "he", "ji": "yi", "mo": "ro"},
}

# The groups of the EC30 data set by its authors: their Kannada is Indo-Aryan.
EC30_GROUPS = {
    "Germanic": "de nl sv da af lb",
    "Romance": "fr es it pt ro oc",
    "Slavic": "ru cs pl bg uk sr",
    "Indo-Aryan": "hi bn kn mr sd gu",
    "Afro-Asiatic": "ar he mt ha ti am",
}
